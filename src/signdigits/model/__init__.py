"""The network, its input pipeline, its training and its calibration."""
