"""The procedural data set: drawn scenes of one or two coloured shapes, their captions, and probes of a model.

Every scene is known exactly, so a trained model can be asked about each factor alone: colour, shape, size,
place, relation, and whether it binds a colour to the right shape. Six colour x shape pairs are kept out of
training altogether. Everything in the test splits wears one of them, and each colour-swapped caption then
names pairs that *were* trained: a model that goes by what it has seen together, and not by the picture, fails
the binding probe.
"""

from data_pipelines.shapes.dataset import generate

__all__ = ["generate"]
