"""A form of one's own in one file: ReLU features with the linear engine of the house."""

from __future__ import annotations

from typing import Any

import torch

from passes.form import YES, Form, FormSpec, Paper, Params, Reason, Verdict, no
from passes.opcount import OpCount
from passes.site import AttentionSite, Dims, Mask


class Relu(Form):
    """phi(x) = relu(x) + 1e-3: not an estimate of softmax, but the simplest positive map."""

    name = "example_relu"
    family = "kernelised"
    paper = Paper("Choromanski et al.", "Rethinking Attention with Performers", 2021)
    formula = "o_i = phi(q_i) S / (phi(q_i) z)"

    def applies(self, site: AttentionSite) -> Verdict:
        if site.mask.kind != "none":
            return no(Reason.MASK_UNKNOWN, f"mask {site.mask.kind} is not carried")
        return YES

    def weights(
        self, spec: FormSpec, params: Params, q: Any, k: Any, key_mask: Any = None, bias: Any = None
    ) -> torch.Tensor:
        scores = (q.relu() + 1e-3) @ (k.relu() + 1e-3).transpose(-1, -2)
        return scores / scores.sum(-1, keepdim=True)

    def attend(
        self,
        spec: FormSpec,
        params: Params,
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any = None,
        bias: Any = None,
    ) -> torch.Tensor:
        fq, fk = q.relu() + 1e-3, k.relu() + 1e-3
        state, total = fk.transpose(-1, -2) @ v, fk.sum(-2)
        return (fq @ state) / (fq * total.unsqueeze(-2)).sum(-1, keepdim=True)

    def ops(self, site: AttentionSite) -> OpCount:
        raise NotImplementedError("this example is not compiled; see passes/forms/elu.py")

    def kernel(self, kit: Any, spec: FormSpec, params: Any, q: Any, k: Any, v: Any, *_: Any) -> Any:
        raise NotImplementedError("this example is not compiled; see passes/forms/elu.py")


def main() -> None:
    torch.manual_seed(0)
    site = AttentionSite("x#0", "x", Dims(1, 2, 2, 16, 16, 8, 8), "float32", 8**-0.5, Mask())
    form = Relu()
    q, k, v = (torch.randn(1, 2, 16, 8, dtype=torch.float64) for _ in range(3))
    spec = form.spec(site)
    out, weights = form.attend(spec, {}, q, k, v), form.weights(spec, {}, q, k)
    print("applies:", form.applies(site))
    print("linear form minus quadratic form:", float((out - weights @ v).abs().max()))


if __name__ == "__main__":
    main()
