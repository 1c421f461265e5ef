//! Field numbers and enumerations of `onnx.proto` (onnx/onnx, Apache-2.0), as far as they are read or written.

/// `ModelProto`.
pub(super) mod model {
    pub const IR_VERSION: u32 = 1;
    pub const PRODUCER_NAME: u32 = 2;
    pub const PRODUCER_VERSION: u32 = 3;
    pub const GRAPH: u32 = 7;
    pub const OPSET_IMPORT: u32 = 8;
    pub const METADATA_PROPS: u32 = 14;
    pub const TRAINING_INFO: u32 = 20;
    pub const FUNCTIONS: u32 = 25;
}

/// `OperatorSetIdProto`.
pub(super) mod opset {
    pub const DOMAIN: u32 = 1;
    pub const VERSION: u32 = 2;
}

/// `GraphProto`.
pub(super) mod graph {
    pub const NODE: u32 = 1;
    pub const NAME: u32 = 2;
    pub const INITIALIZER: u32 = 5;
    pub const INPUT: u32 = 11;
    pub const OUTPUT: u32 = 12;
    pub const VALUE_INFO: u32 = 13;
    pub const SPARSE_INITIALIZER: u32 = 15;
}

/// `NodeProto`.
pub(super) mod node {
    pub const INPUT: u32 = 1;
    pub const OUTPUT: u32 = 2;
    pub const NAME: u32 = 3;
    pub const OP_TYPE: u32 = 4;
    pub const ATTRIBUTE: u32 = 5;
    pub const DOMAIN: u32 = 7;
    pub const OVERLOAD: u32 = 8;
}

/// `AttributeProto`.
pub(super) mod attribute {
    pub const NAME: u32 = 1;
    pub const FLOAT: u32 = 2;
    pub const INT: u32 = 3;
    pub const STRING: u32 = 4;
    pub const TENSOR: u32 = 5;
    pub const GRAPH: u32 = 6;
    pub const FLOATS: u32 = 7;
    pub const INTS: u32 = 8;
    pub const STRINGS: u32 = 9;
    pub const TYPE: u32 = 20;
    pub const REF_ATTR_NAME: u32 = 21;
}

/// `AttributeProto.AttributeType`.
pub(super) mod attribute_type {
    pub const FLOAT: i64 = 1;
    pub const INT: i64 = 2;
    pub const STRING: i64 = 3;
    pub const TENSOR: i64 = 4;
    pub const GRAPH: i64 = 5;
    pub const FLOATS: i64 = 6;
    pub const INTS: i64 = 7;
    pub const STRINGS: i64 = 8;
}

/// `TensorProto`.
pub(super) mod tensor {
    pub const DIMS: u32 = 1;
    pub const DATA_TYPE: u32 = 2;
    pub const SEGMENT: u32 = 3;
    pub const FLOAT_DATA: u32 = 4;
    pub const INT32_DATA: u32 = 5;
    pub const STRING_DATA: u32 = 6;
    pub const INT64_DATA: u32 = 7;
    pub const NAME: u32 = 8;
    pub const RAW_DATA: u32 = 9;
    pub const DOUBLE_DATA: u32 = 10;
    pub const UINT64_DATA: u32 = 11;
    pub const EXTERNAL_DATA: u32 = 13;
    pub const DATA_LOCATION: u32 = 14;
    pub const METADATA_PROPS: u32 = 16;
}

/// `TensorProto.DataLocation.EXTERNAL`.
pub(super) const EXTERNAL: i64 = 1;

/// `ValueInfoProto`.
pub(super) mod value_info {
    pub const NAME: u32 = 1;
    pub const TYPE: u32 = 2;
}

/// `TypeProto`.
pub(super) mod value_type {
    pub const TENSOR: u32 = 1;
    pub const SEQUENCE: u32 = 4;
    pub const MAP: u32 = 5;
    pub const SPARSE_TENSOR: u32 = 8;
    pub const OPTIONAL: u32 = 9;
}

/// `TypeProto.Tensor`.
pub(super) mod tensor_type {
    pub const ELEM_TYPE: u32 = 1;
    pub const SHAPE: u32 = 2;
}

/// `TensorShapeProto` and its `Dimension`.
pub(super) mod shape {
    pub const DIM: u32 = 1;
    pub const DIM_VALUE: u32 = 1;
    pub const DIM_PARAM: u32 = 2;
}

/// `StringStringEntryProto`.
pub(super) mod entry {
    pub const KEY: u32 = 1;
    pub const VALUE: u32 = 2;
}
