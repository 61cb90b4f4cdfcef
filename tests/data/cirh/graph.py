"A captured graph as plain calls of ATen operators; graph.json says where each line came from."
import torch
aten = torch.ops.aten

def forward(w, xs, device='cpu'):
    "`w`: weights by name; `xs`: list of tensors; returns a list of tensors"
    t0 = aten.conv2d.default(xs[0], w['stem.weight'], w['stem.bias'], [1, 1], [1, 1])
    t1 = aten.batch_norm.default(t0, w['norm.weight'], w['norm.bias'], w['norm.running_mean'], w['norm.running_var'], False, 0.1, 1e-05, False); del t0
    t2 = aten.relu.default(t1); del t1
    t3 = aten.max_pool2d.default(t2, [2, 2], [2, 2]); del t2
    t4 = aten.repeat.default(w['depthwise.weight'], [1, 8, 1, 1])
    t5 = aten.arange.default(8, device=device, pin_memory=False)
    t6 = aten.unsqueeze.default(t5, 1)
    t7 = aten.unsqueeze.default(t5, 0); del t5
    t8 = aten.eq.Tensor(t6, t7); del t6, t7
    t9 = aten.to.dtype(t8, torch.float32); del t8
    t10 = aten.reshape.default(t9, [8, 8, 1, 1]); del t9
    t11 = aten.mul.Tensor(t4, t10); del t4, t10
    t12 = aten.conv2d.default(t3, t11, w['depthwise.bias'], [1, 1], [1, 1]); del t3, t11
    t13 = aten.add.Tensor(t12, 3)
    t14 = aten.relu6.default(t13); del t13
    t15 = aten.div.Tensor(t14, 6); del t14
    t16 = aten.mul.Tensor(t12, t15); del t12, t15
    t17 = aten.flatten.using_ints(t16, 2); del t16
    t18 = aten.mean.dim(t17, [2]); del t17
    t19 = aten.layer_norm.default(t18, [8], w['scale.weight'], w['scale.bias'], 1e-05, False); del t18
    t20 = aten.linear.default(t19, w['head.weight'], w['head.bias'])
    return [t20]
