"""The table of lint rules: each a function of the graph and the target, with the source of its claim.

To add a rule: write the function in a file of this folder, add its entry here, add a case to tests/lint/test_lint.py.
"""

from __future__ import annotations

from edgedetr.lint.lint_issue import LintRule
from edgedetr.lint.rules import limits, normalization, operators, quantized, shapes, structure, tensor_sizes, types

_DOCS = "https://docs.nvidia.com/deeplearning/tensorrt/latest"
_QUANTIZED = f"{_DOCS}/inference-library/work-quantized-types.html"
_PARSER = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
_MODELOPT = "https://github.com/NVIDIA/Model-Optimizer (modelopt.onnx.quantization)"
_ONNX = "https://onnx.ai/onnx/repo-docs/IR.html"
_ISSUES = "https://github.com/NVIDIA/TensorRT/issues"

RULES: tuple[LintRule, ...] = (
    LintRule("inference", types.uninferable, "https://onnx.ai/onnx/api/shape_inference.html"),
    LintRule("external-data", shapes.external_data, "https://onnx.ai/onnx/repo-docs/ExternalData.html"),
    LintRule("names", structure.names, _ONNX),
    LintRule("damaged-weights", structure.damaged_weights, _ONNX),
    LintRule("schema", structure.by_schema, "https://onnx.ai/onnx/operators/"),
    LintRule("element-type", structure.element_types, _PARSER),
    LintRule("inner-type", structure.inner_types, _PARSER),
    LintRule("dimensions", limits.dimensions, f"{_DOCS}/reference/operators.html"),
    LintRule("sizes", tensor_sizes.sizes, "https://onnx.ai/onnx/operators/"),
    LintRule("parameters", tensor_sizes.parameters, "https://onnx.ai/onnx/operators/"),
    LintRule("opset", shapes.opset, _PARSER, by_target=True),
    LintRule("quantized-opset", shapes.quantized_opset, "https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html"),
    LintRule("open-input", shapes.open_input, f"{_ISSUES}/4813"),
    LintRule("untyped-output", shapes.untyped_output, "parser of TensorRT-RTX 1.7.1: Failed to convert ONNX date type"),
    LintRule("open-channels", shapes.open_channels, _QUANTIZED),
    LintRule("shape-arithmetic", shapes.shape_arithmetic, f"{_DOCS}/performance/best-practices.html"),
    LintRule("foreign-domain", operators.foreign_domain, _PARSER, by_target=True),
    LintRule("unknown-operator", operators.unknown_operator, _PARSER, by_target=True),
    LintRule("operator-type", limits.operator_type, _PARSER, by_target=True),
    LintRule("operator-limit", limits.operator_limit, _PARSER, by_target=True),
    LintRule("operator-input", limits.operator_input, _PARSER, by_target=True),
    LintRule("combination", limits.combinations, "parser of TensorRT-RTX 1.7.1"),
    LintRule("data-dependent", operators.data_dependent, f"{_DOCS}/inference-library/work-dynamic-shapes.html"),
    LintRule("control-flow", operators.control_flow, f"{_DOCS}/performance/best-practices.html"),
    LintRule("integer-operator", operators.integer_operators, _PARSER),
    LintRule("too-new", operators.too_new, _PARSER, by_target=True),
    LintRule("topk-bound", operators.topk_bound, "builder of TensorRT-RTX 1.7.1: K exceeds the maximum value (3840)"),
    LintRule("grid-sample-mode", operators.grid_sample_mode, f"{_ISSUES}/4646", by_target=True),
    LintRule("grid-sample-rank", operators.grid_sample_rank, _PARSER, by_target=True),
    LintRule("grid-sample-wrong", operators.grid_sample_wrong, f"{_ISSUES}/4813", by_target=True),
    LintRule("batch-norm", operators.batch_norm, _QUANTIZED),
    LintRule(
        "layer-norm",
        normalization.written_out_layer_norm,
        "https://github.com/marcoslucianops/DeepStream-Yolo/pull/647",
    ),
    LintRule("zero-point", quantized.zero_point, _QUANTIZED),
    LintRule("scale-value", quantized.scale_value, _QUANTIZED, by_target=True),
    LintRule("scale-type", quantized.scale_type, "NvInfer.h of TensorRT 10.3 and 11.1, IQuantizeLayer", by_target=True),
    LintRule("scale-axis", quantized.scale_axis, _QUANTIZED),
    LintRule("per-channel-activation", quantized.per_channel_activation, _QUANTIZED),
    LintRule("weight-axis", quantized.weight_axis, _MODELOPT, by_target=True),
    LintRule("one-side-quantized", quantized.one_side_quantized, _QUANTIZED),
    LintRule("small-product", quantized.small_product, _MODELOPT),
    LintRule("narrow-convolution", quantized.narrow_convolution, _MODELOPT),
    LintRule("grouped-convolution", quantized.grouped_convolution, f"{_ISSUES}/4529"),
    LintRule("half-quantized-attention", quantized.half_quantized_attention, f"{_ISSUES}/3243"),
    LintRule("before-relu", quantized.before_relu, _QUANTIZED),
    LintRule("concat-scales", quantized.concat_scales, _QUANTIZED),
    LintRule("transposed-convolution", quantized.transposed_convolution, _MODELOPT),
    LintRule(
        "equal-types",
        types.equal_types,
        f"{_DOCS}/inference-library/advanced.html#strongly-typed-networks",
        by_target=True,
    ),
    LintRule("float64", types.double, _PARSER),
    LintRule("not-a-number", types.not_a_number, _PARSER),
)
