"""``gpu-bn demo``: what batch normalisation does to a small sigmoid network, trained on real digits.

It needs the ``demo`` extra: scikit-learn, matplotlib, rich.
"""
