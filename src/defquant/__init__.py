"""Defensive Quantization: networks that are small and hard to fool.

Importing the package imports no torch; each name is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from defquant.attacks import APGD as APGD
    from defquant.attacks import BIM as BIM
    from defquant.attacks import DIVA as DIVA
    from defquant.attacks import FAB as FAB
    from defquant.attacks import FGSM as FGSM
    from defquant.attacks import PGD as PGD
    from defquant.attacks import RFGSM as RFGSM
    from defquant.attacks import Adaptive as Adaptive
    from defquant.attacks import Attack as Attack
    from defquant.attacks import Random as Random
    from defquant.attacks import Square as Square
    from defquant.attacks import Standard as Standard
    from defquant.attacks import Transfer as Transfer
    from defquant.attacks import Worst as Worst
    from defquant.checkpoint import load_model as load_model
    from defquant.config import DataConfig as DataConfig
    from defquant.config import ModelConfig as ModelConfig
    from defquant.config import TrainConfig as TrainConfig
    from defquant.data import Dataset as Dataset
    from defquant.data import load as load
    from defquant.deploy.parity import parity as parity
    from defquant.deploy.ship import export_onnx as export_onnx
    from defquant.diagnose import audit as audit
    from defquant.diagnose import masking_verdict as masking_verdict
    from defquant.diagnose import transfer_matrix as transfer_matrix
    from defquant.errors import DefquantWarning as DefquantWarning
    from defquant.errors import UserError as UserError
    from defquant.evaluate import accuracy as accuracy
    from defquant.evaluate import robust_accuracy as robust_accuracy
    from defquant.evaluate import sweep as sweep
    from defquant.judging.verdict import judge as judge
    from defquant.lipschitz import ConvexSum as ConvexSum
    from defquant.lipschitz import OrthogonalPenalty as OrthogonalPenalty
    from defquant.lipschitz import project_simplex_ as project_simplex_
    from defquant.models import FeatureSqueezing as FeatureSqueezing
    from defquant.models import resnet18 as resnet18
    from defquant.models import vgg16 as vgg16
    from defquant.models import wide_resnet as wide_resnet
    from defquant.prepared import prepare as prepare
    from defquant.quantize import QuantReLU as QuantReLU
    from defquant.quantize import QuantSigned as QuantSigned
    from defquant.quantize import QuantTanh as QuantTanh
    from defquant.quantize import set_bits as set_bits
    from defquant.records import Score as Score
    from defquant.records import results as results
    from defquant.report import build_report as build_report
    from defquant.rounding import fake_quantize as fake_quantize
    from defquant.training import train as train

_HOMES = {
    "attacks": (
        "APGD", "BIM", "DIVA", "FAB", "FGSM", "PGD", "RFGSM", "Adaptive", "Attack", "Random",
        "Square", "Standard", "Transfer", "Worst",
    ),
    "checkpoint": ("load_model",),
    "config": ("DataConfig", "ModelConfig", "TrainConfig"),
    "data": ("Dataset", "load"),
    "deploy.parity": ("parity",),
    "deploy.ship": ("export_onnx",),
    "diagnose": ("audit", "masking_verdict", "transfer_matrix"),
    "errors": ("DefquantWarning", "UserError"),
    "evaluate": ("accuracy", "robust_accuracy", "sweep"),
    "judging.verdict": ("judge",),
    "lipschitz": ("ConvexSum", "OrthogonalPenalty", "project_simplex_"),
    "models": ("FeatureSqueezing", "resnet18", "vgg16", "wide_resnet"),
    "prepared": ("prepare",),
    "quantize": ("QuantReLU", "QuantSigned", "QuantTanh", "set_bits"),
    "records": ("Score", "results"),
    "report": ("build_report",),
    "rounding": ("fake_quantize",),
    "training": ("train",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("defquant")
        except PackageNotFoundError:  # run from its sources, by PYTHONPATH
            return "uninstalled"
    if name not in _HOME:
        raise AttributeError(f"module 'defquant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"defquant.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
