module  {
  func @graph(%arg0: tensor<8xf32> {tf.aliasing_output = 0 : i64, tf.resource_name = "state.model.depthwise.bias"}, %arg1: tensor<8x1x3x3xf32> {tf.aliasing_output = 1 : i64, tf.resource_name = "state.model.depthwise.weight"}, %arg2: tensor<3xf32> {tf.aliasing_output = 2 : i64, tf.resource_name = "state.model.head.bias"}, %arg3: tensor<3x8xf32> {tf.aliasing_output = 3 : i64, tf.resource_name = "state.model.head.weight"}, %arg4: tensor<8xf32> {tf.aliasing_output = 4 : i64, tf.resource_name = "state.model.norm.bias"}, %arg5: tensor<8xf32> {tf.aliasing_output = 5 : i64, tf.resource_name = "state.model.norm.running_mean"}, %arg6: tensor<8xf32> {tf.aliasing_output = 6 : i64, tf.resource_name = "state.model.norm.running_var"}, %arg7: tensor<8xf32> {tf.aliasing_output = 7 : i64, tf.resource_name = "state.model.norm.weight"}, %arg8: tensor<8xf32> {tf.aliasing_output = 8 : i64, tf.resource_name = "state.model.scale.bias"}, %arg9: tensor<8xf32> {tf.aliasing_output = 9 : i64, tf.resource_name = "state.model.scale.weight"}, %arg10: tensor<8xf32> {tf.aliasing_output = 10 : i64, tf.resource_name = "state.model.stem.bias"}, %arg11: tensor<8x3x3x3xf32> {tf.aliasing_output = 11 : i64, tf.resource_name = "state.model.stem.weight"}, %arg12: tensor<2x3x8x8xf32> {cs.input_name = "input_0"}) -> (tensor<8xf32>, tensor<8x1x3x3xf32>, tensor<3xf32>, tensor<3x8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8x3x3x3xf32>, tensor<2x3xf32> {cs.output_name = "output_0_0"}) attributes {cs.fp16_type = "float16", cs.pol = 1 : i64} {
    %cst = cirh.Const dense<1.600000e+01> : tensor<2x8xf32>
    %cst_0 = cirh.Const dense<6.000000e+00> : tensor<2x8x4x4xf32>
    %cst_1 = cirh.Const dense<0.000000e+00> : tensor<2x8x4x4xf32>
    %cst_2 = cirh.Const dense<3.000000e+00> : tensor<2x8x4x4xf32>
    %cst_3 = cirh.Const dense<0> : tensor<i64>
    %cst_4 = cirh.Const dense<1> : tensor<i64>
    %cst_5 = cirh.Const dense<8> : tensor<i64>
    %0 = cirh.Arange %cst_3, %cst_5, %cst_4 {dim = 0 : i64} : (tensor<i64>, tensor<i64>, tensor<i64>) -> tensor<8xi64>
    %1 = cirh.Reshape %0 : (tensor<8xi64>) -> tensor<1x8xi64>
    %2 = cirh.Reshape %0 : (tensor<8xi64>) -> tensor<8x1xi64>
    %3 = cirh.BroadcastInDim %2 {broadcast_dimensions = dense<[0, 1]> : tensor<2xi64>} : (tensor<8x1xi64>) -> tensor<8x8xi64>
    %4 = cirh.BroadcastInDim %1 {broadcast_dimensions = dense<[0, 1]> : tensor<2xi64>} : (tensor<1x8xi64>) -> tensor<8x8xi64>
    %5 = cirh.Compare %3, %4 {comparison_direction = "EQ"} : tensor<8x8xi64> -> tensor<8x8xi1>
    %6 = cirh.Cast %5 {Truncate = false} : tensor<8x8xi1> -> tensor<8x8xf32>
    %7 = cirh.Reshape %6 : (tensor<8x8xf32>) -> tensor<8x8x1x1xf32>
    %8 = cirh.BroadcastInDim %arg1 {broadcast_dimensions = dense<[0, 1, 2, 3]> : tensor<4xi64>} : (tensor<8x1x3x3xf32>) -> tensor<8x8x3x3xf32>
    %9 = cirh.BroadcastInDim %7 {broadcast_dimensions = dense<[0, 1, 2, 3]> : tensor<4xi64>} : (tensor<8x8x1x1xf32>) -> tensor<8x8x3x3xf32>
    %10 = cirh.Mul %8, %9 : tensor<8x8x3x3xf32>
    %11 = cirh.Convolution %arg12, %arg11 {conv_pass_direction = "FWD", data_format = "NCHW", dilation = dense<1> : tensor<2xi64>, groups = 1 : i64, padding = dense<1> : tensor<2xi64>, stride = dense<1> : tensor<2xi64>} : (tensor<2x3x8x8xf32>, tensor<8x3x3x3xf32>) -> tensor<2x8x8x8xf32>
    %12 = cirh.BiasAdd %11, %arg10 {dim = 1 : i64} : (tensor<2x8x8x8xf32>, tensor<8xf32>) -> tensor<2x8x8x8xf32>
    %y, %batch_mean, %batch_variance = cirh.FusedBatchNorm %12, %arg7, %arg4, %arg5, %arg6 {data_format = "NCHW", epsilon = 9.99999974E-6 : f32, exponential_avg_factor = 1.000000e-01 : f32, is_training = false} : (tensor<2x8x8x8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>) -> (tensor<2x8x8x8xf32>, tensor<8xf32>, tensor<8xf32>)
    %13 = cirh.Relu %y : tensor<2x8x8x8xf32>
    %14 = cirh.Reshape %13 : (tensor<2x8x8x8xf32>) -> tensor<2x8x1x8x8xf32>
    %15 = "cirh.Pool"(%14, %14) {data_format = "NCDHW", dilation = dense<1> : tensor<5xi64>, ksize = dense<[1, 1, 1, 2, 2]> : tensor<5xi64>, padding = dense<0> : tensor<10xi64>, pool_type = "MAX", strides = dense<[1, 1, 1, 2, 2]> : tensor<5xi64>} : (tensor<2x8x1x8x8xf32>, tensor<2x8x1x8x8xf32>) -> tensor<2x8x1x4x4xf32>
    %16 = cirh.Reshape %15 : (tensor<2x8x1x4x4xf32>) -> tensor<2x8x4x4xf32>
    %17 = cirh.Convolution %16, %10 {conv_pass_direction = "FWD", data_format = "NCHW", dilation = dense<1> : tensor<2xi64>, groups = 1 : i64, padding = dense<1> : tensor<2xi64>, stride = dense<1> : tensor<2xi64>} : (tensor<2x8x4x4xf32>, tensor<8x8x3x3xf32>) -> tensor<2x8x4x4xf32>
    %18 = cirh.BiasAdd %17, %arg0 {dim = 1 : i64} : (tensor<2x8x4x4xf32>, tensor<8xf32>) -> tensor<2x8x4x4xf32>
    %19 = cirh.Add %18, %cst_2 : tensor<2x8x4x4xf32>
    %20 = cirh.Clamp %19, %cst_1, %cst_0 : (tensor<2x8x4x4xf32>, tensor<2x8x4x4xf32>, tensor<2x8x4x4xf32>) -> tensor<2x8x4x4xf32>
    %21 = cirh.Div %20, %cst_0 : tensor<2x8x4x4xf32>
    %22 = cirh.Mul %18, %21 : tensor<2x8x4x4xf32>
    %23 = cirh.Reshape %22 : (tensor<2x8x4x4xf32>) -> tensor<2x8x16xf32>
    %24 = cirh.Reduce %23 {dimensions = dense<2> : tensor<1xi64>, keep_dims = dense<> : tensor<0xi64>, reduce_kind = "ADD"} : (tensor<2x8x16xf32>) -> tensor<2x8xf32>
    %25 = cirh.Div %24, %cst : tensor<2x8xf32>
    %26 = cirh.LayerNorm %25, %arg8, %arg9 {epsilon = 9.99999974E-6 : f32} : (tensor<2x8xf32>, tensor<8xf32>, tensor<8xf32>) -> tensor<2x8xf32>
    %27 = cirh.MatMul %26, %arg3 {cs.internal = {}, transpose_a = false, transpose_b = true} : (tensor<2x8xf32>, tensor<3x8xf32>) -> tensor<2x3xf32>
    %28 = cirh.BroadcastInDim %arg2 {broadcast_dimensions = dense<1> : tensor<1xi64>} : (tensor<3xf32>) -> tensor<2x3xf32>
    %29 = cirh.Add %28, %27 : tensor<2x3xf32>
    return %arg0, %arg1, %arg2, %arg3, %arg4, %arg5, %arg6, %arg7, %arg8, %arg9, %arg10, %arg11, %29 : tensor<8xf32>, tensor<8x1x3x3xf32>, tensor<3xf32>, tensor<3x8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8xf32>, tensor<8x3x3x3xf32>, tensor<2x3xf32>
  }
}

