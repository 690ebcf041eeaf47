"""``gpu-bn demo``: train a small sigmoid network on handwritten digits, with and without batch normalisation.

It needs the extra ``demo``: scikit-learn, matplotlib, rich, threadpoolctl.
"""
