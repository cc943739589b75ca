"""HSNet, tensors in and tensors out: backbones, hypercorrelations, 4D convolutions, learner, fusion, loss, metrics.

Reading order: backbone, correlation, conv4d, model, fusion, loss, metrics. Needs torch and torchvision only.
"""
