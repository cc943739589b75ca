"""HSNet, tensors in and tensors out: backbones, hypercorrelations, 4D convolutions, learner, vote, loss, metrics.

Reading order: backbone, correlation, conv4d, model, vote, loss, metrics. Needs torch and torchvision only.
"""
