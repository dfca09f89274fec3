"""How often weights are read: the cost of a round where reading them is what takes the time."""

from collections.abc import Collection, Sequence

from torch import nn

from kernels.exit_head import Head
from model import Transformer


def module_bytes(module: nn.Module) -> int:
    """Add up the bytes of the weights of a layer or of a part of it, scales included."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def head_bytes(head: Head) -> int:
    """Return the bytes of an LM head, its scale included."""
    return head.weight.nbytes + (0 if head.scale is None else head.scale.nbytes)


class Visits:
    """Counts reads of weights in layers and in LM heads of the full model, by their bytes.

    A layer of the model counts 1, and so does its LM head. What has fewer bytes counts their share: a layer with
    skipped sublayers, a low-bit layer or head of the draft model, a head trimmed to some tokens.
    Attributes: draft_head, what one read of the drafts' LM head counts.
    """

    def __init__(self, model: Transformer, draft_model: Transformer | None = None, draft_vocab: int | None = None):
        layer = model.layers[0]
        attention, mlp = module_bytes(layer.attention), module_bytes(layer.mlp)
        self.attention = attention / (attention + mlp)
        self.draft_layer = self.draft_head = 1.0
        if draft_model:
            self.draft_layer = module_bytes(draft_model.layers[0]) / module_bytes(layer)
            self.draft_head = head_bytes(draft_model.exit_head()) / head_bytes(model.exit_head())
        if draft_vocab is not None:
            self.draft_head *= draft_vocab / model.args.vocab_size

    def run(
        self,
        start: int,
        stop: int,
        skip_attention: Collection[int] = (),
        skip_mlp: Collection[int] = (),
        draft: bool = False,
    ) -> float:
        """Count a run of layers start..stop-1. draft: of the draft model, if there is one."""
        skipped = [sum(start <= layer < stop for layer in skips) for skips in (skip_attention, skip_mlp)]
        return self.layers(stop - start, skipped, draft)

    def layers(self, layers: int, skipped: Sequence[int] = (0, 0), draft: bool = False) -> float:
        """Count so many layers, less the attentions and MLPs that were skipped in them."""
        attention, mlp = skipped
        read = layers - attention * self.attention - mlp * (1 - self.attention)
        return read * self.draft_layer if draft else read
