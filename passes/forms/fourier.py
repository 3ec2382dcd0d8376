"""fourier: attention as an integral with a linear kernel, without softmax (Cao 2021)."""

from __future__ import annotations

from passes.form import FormSpec
from passes.forms._operator import OperatorForm


class Fourier(OperatorForm):
    """scale LN(q) (LN(k)^T v) / n over the n visible keys.

    The paper writes (LN(q) LN(k)^T) v and pays for all pairs; nothing stands between the products,
    so they are taken in the order that is linear in the tokens. `gamma` and `beta` of the layer
    norms are per head and train. Made to be trained. Dropout has no counterpart.
    """

    name = "fourier"
    formula = "scale * (LN(q) LN(k)^T) v / n"
    normed = "qk"

    def scale(self, spec: FormSpec) -> float:
        """The site's scale."""
        return abs(spec.scale)
