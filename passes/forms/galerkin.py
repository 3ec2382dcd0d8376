"""galerkin: attention of a Petrov-Galerkin projection, without softmax (Cao 2021)."""

from __future__ import annotations

from passes.form import FormSpec
from passes.forms._operator import OperatorForm


class Galerkin(OperatorForm):
    """q (LN(k)^T LN(v)) / n over the n visible keys; the columns of k and v are basis functions.

    `gamma` and `beta` of the layer norms are per head and train. Weights have any sign and no
    relation to a softmax: made to be trained. No scale. Dropout has no counterpart.
    """

    name = "galerkin"
    formula = "q (LN(k)^T LN(v)) / n"
    normed = "kv"

    def scale(self, spec: FormSpec) -> float:
        """1: the norms and the mean set the size."""
        return 1.0
