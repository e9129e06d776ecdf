"""What each sign of masked gradients means, and what to do: as `docs/flags.md` explains them."""

from collections.abc import Mapping

__all__ = ["DO", "MEANS"]

MEANS: Mapping[str, str] = {
    "one step": "one step breaks what many steps leave: the walk is led astray",
    "black box": "another network's images break what the white box leaves",
    "huge eps": "images stand within 0.5 of grey, where none can: the attack does not move",
    "random search": "search without gradients breaks what every gradient attack leaves",
    "more steps": "twice the steps break much more: the attack had not converged",
    "zero gradient": "the gradient is zero or no number: gradient attacks are blind",
    "jumps": "the gradient says nothing of the loss nearby: the network is no smooth function",
    "mid-path": "the walk broke images and came back whole: its last iterate overstates",
    "noise": "random noise raises the loss more than one gradient step: FGSM's number is void",
    "loss": "losses that cannot underflow break what the cross-entropy leaves",
    "surrogate": "another backward pass breaks what the straight-through gradient leaves",
    "randomness": "identical calls give other logits: a score is partly chance",
}
DO: Mapping[str, str] = {
    "one step": "quote the worst case over attacks (standard, adaptive)",
    "black box": "quote the black box too, and attack through a surrogate",
    "huge eps": "find where the gradient is lost, and attack through a surrogate there",
    "random search": "quote standard, with more queries",
    "more steps": "raise the steps until nothing changes, or use adaptive",
    "zero gradient": "attack through a surrogate, or as a black box; see clip and high in training",
    "jumps": "attack through a surrogate (adaptive) or without gradients (square)",
    "mid-path": "keep the best iterate, as all attacks of defquant do",
    "noise": "quote PGD or standard; train with pgd",
    "loss": "quote apgd-dlr, standard or adaptive",
    "surrogate": "quote adaptive",
    "randomness": "fix the draws, or attack the average over many (EOT)",
}
