const LIMIT = 8 << 20;  // as BYTES of server.py
const canvas = () => element.querySelector('canvas');
const say = (text) => { element.querySelector('[role=alert]').textContent = text; };
const show = (source) => new Promise((done) => {
  const image = new Image();
  image.onload = () => { canvas().getContext('2d').drawImage(image, 0, 0); done(); };
  image.src = source;
});
const send = (data) => { say(''); trigger('select', data); };
const drawn = () => send({name: 'the drawing', data: canvas().toDataURL('image/png')});
const taken = (button) => {
  for (const other of element.querySelectorAll('[data-test]'))
    other.setAttribute('aria-pressed', String(other === button));
  return button;
};
let pen = false;
const draw = (event) => {
  const c = canvas(), box = c.getBoundingClientRect(), ink = c.getContext('2d');
  ink.fillStyle = element.querySelector('[type=color]').value;
  const x = (event.clientX - box.left) / box.width * c.width;
  const y = (event.clientY - box.top) / box.height * c.height;
  const size = Math.max(1, Math.round(c.width / 16));
  ink.fillRect(Math.floor(x - (size - 1) / 2), Math.floor(y - (size - 1) / 2), size, size);
};
element.addEventListener('click', async (event) => {
  const button = event.target.closest('[data-test]');
  if (button) {
    await show(taken(button).querySelector('img').src);
    send({test: Number(button.dataset.test)});
  } else if (event.target.closest('[data-clear]')) {
    const c = canvas();
    c.getContext('2d').fillRect(0, 0, c.width, c.height);
    taken(null); drawn();
  }
});
element.addEventListener('change', (event) => {
  const file = event.target.files && event.target.files[0];
  if (!file) return;
  event.target.value = '';
  const reader = new FileReader();
  reader.onload = async () => {
    const found = file.size > LIMIT ? {error: 'a picture has 8 MiB at most'}
      : await server.fit({name: file.name, data: reader.result});
    if (found.error) return say(found.error);
    await show(found.picture);
    taken(null);
    send({name: file.name, data: found.picture});
  };
  reader.readAsDataURL(file);
});
element.addEventListener('pointerdown', (event) => {
  if (event.target !== canvas()) return;
  event.preventDefault(); pen = true; draw(event);
});
element.addEventListener('pointermove', (event) => {
  if (pen && event.target === canvas()) draw(event);
});
window.addEventListener('pointerup', () => { if (pen) { pen = false; taken(null); drawn(); } });
show(taken(element.querySelector('[data-test]')).querySelector('img').src);
