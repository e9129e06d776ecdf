"""Classify an image with onnxruntime, numpy and pillow alone: no torch, no defquant.

    python examples/serve.py model.onnx image.png

The image is resized to what the model takes, whatever its own proportions are.
"""

import json
import sys

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def serve(model: str, picture: str) -> None:
    """Print the three likeliest classes with their probabilities."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    _, channels, height, width = image.shape
    # no other formats: pillow hands PostScript, whatever its file is called, to Ghostscript to run
    with Image.open(picture, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as file:
        upright = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(upright.resize((width, height))).reshape(1, height, width, channels)
    x = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    x = x if image.type == "tensor(uint8)" else x.astype(np.float32) / 255
    logits = session.run(None, {image.name: x})[0][0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    facts = json.loads(session.get_modelmeta().custom_metadata_map.get("defquant", "{}"))
    names = facts.get("classes") or range(len(shares))
    for number in np.argsort(-shares, kind="stable")[:3]:
        print(f"{shares[number]:6.1%}  {names[number]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: python serve.py MODEL.onnx IMAGE", file=sys.stderr)
        sys.exit(2)
    try:
        serve(*sys.argv[1:])
    except Exception as error:  # pillow, onnxruntime and the file system each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"cannot classify {sys.argv[2]} with {sys.argv[1]}: {reason}", file=sys.stderr)
        sys.exit(2)
