"""Flags of models of the user's own, and of saved images. No torch."""

from jsonargparse import ArgumentParser

__all__ = ["anyone_flags", "rescore_flags"]


def anyone_flags(parser: ArgumentParser) -> None:
    """What `attack` takes beside runs."""
    _model_flags(parser)
    parser.add_argument("--data", type=str | None, default=None, help="for --model_file: its data")
    parser.add_argument(
        "--out", type=str | None, default=None, help="for --model_file: folder of the results"
    )
    parser.add_argument(
        "--save_images", type=str | None, default=None,
        help="empty folder for the adversarial images as PNG with a manifest; scored as such, too",
    )  # fmt: skip


def rescore_flags(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, help="folder that attack --save_images wrote")
    parser.add_argument(
        "model", nargs="?", type=str, help="folder of a run, or an .onnx file of export"
    )
    _model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=256, help="images at a time")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", type=bool, default=False, help="JSON lines instead of a table")


def _model_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model_file", type=str | None, default=None,
        help="my.py:make_model, a function that returns a torch.nn.Module of images in [0, 1] to "
        "logits. THIS RUNS YOUR CODE in my.py",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=str | None, default=None, help="for --model_file: a .safetensors file"
    )
