"""Verbs between precisions: transfer."""

from pathlib import Path

from jsonargparse import Namespace

from defquant.commands.rows import print_json
from defquant.config import check_bits
from defquant.errors import UserError

__all__ = ["transfer"]


def transfer(settings: Namespace) -> int:
    """`defquant transfer`: the matrix on stdout, `transfer.json` and `transfer.png` in --out."""
    if settings.batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more; found {settings.batch_size}")
    bits = [check_bits(width) for width in settings.bits]
    from defquant.attacks.names import parse_first_order
    from defquant.diagnose.runs import transfer_runs
    from defquant.distributed import pick_device
    from defquant.files import write_json
    from defquant.report import plot_matrix, text_matrix

    out = Path(settings.out)
    record = transfer_runs(
        [Path(run) for run in settings.runs], parse_first_order(settings.attack, settings.eps),
        bits=bits, images=settings.images, data_root=settings.data_root, seed=settings.seed,
        device=pick_device(settings.device), batch_size=settings.batch_size,
    )  # fmt: skip
    for line in record["cells"] if settings.json else text_matrix(record):
        (print_json if settings.json else print)(line)
    print(plot_matrix(record, out / "transfer.png"))
    print(write_json(out / "transfer.json", record))
    return 0
