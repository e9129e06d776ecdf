"""What each verb does: settings in, files and rows out, exit status back."""

from defquant.commands.diagnose import diagnose
from defquant.commands.pages import data, demo, report, reproduce
from defquant.commands.precision import transfer
from defquant.commands.rescoring import rescore
from defquant.commands.runs import attack, train
from defquant.commands.ship import export, verify

__all__ = [
    "attack", "data", "demo", "diagnose", "export", "report", "reproduce", "rescore", "train",
    "transfer",
    "verify",
]  # fmt: skip
