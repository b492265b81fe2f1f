"""What a runtime or chip wants of a quantized file. A new target is one record in `TARGETS`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    """One record.

    Attributes:
        name: What `--target` calls it.
        description: What it is for.
        storage: From a weight width in bits to the form its integers are stored in (see `write.STORAGE`).
        activation_bits: Widths of activations it takes.
        op_bits: Weight widths by ONNX operator, where it takes fewer than it stores (Conv: 4 and 8 only, say).
        rounds_inputs: Operators that the runtime computes on inputs of 8 bits when only their weights are quantized: no
            simulation shows that, so such weights stay float.
    """

    name: str
    description: str
    storage: dict[int, str] = field(default_factory=dict)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    rounds_inputs: tuple[str, ...] = ()
    op_bits: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Widths of weights that the target can store."""
        return tuple(self.storage)

    def bits_of(self, op: str) -> tuple[int, ...]:
        """Widths of the weights of one operator."""
        return self.op_bits.get(op, self.weight_bits)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "onnxruntime",
            "ONNX Runtime >= 1.23.2: small files whose weights become int8 when the session is created, so that the "
            "integer kernels run",
            storage={2: "lut", 3: "lut", 4: "cast", 5: "int8", 6: "int8", 7: "int8", 8: "int8"},
            rounds_inputs=("MatMul", "Gemm"),  # become MatMulNBits, whose inputs are rounded anew for each block of 32
        ),
        Target(
            "onnx",
            "plain standard ONNX: INT4 initializer -> DequantizeLinear; ONNX Runtime's CPU provider runs it in float",
            storage={2: "int4", 3: "int4", 4: "int4", 5: "int8", 6: "int8", 7: "int8", 8: "int8"},
        ),
    )
}
