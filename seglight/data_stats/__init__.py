"""What is in a dataset: how often each class occurs, where, with which others, how large, in which colours.

Everything is counted in whole numbers in one pass over the samples, so the result does not depend on threads or order::

    stats = statistics(datamodule, "train")
    stats.as_table()                 # a line per class
    stats.draw("stats.png")          # one picture
    stats.class_weights("median")    # for the loss
    stats.as_dict()                  # stats.json
"""

from seglight.data_stats.count import statistics
from seglight.data_stats.result import WEIGHTS, Statistics

__all__ = ["WEIGHTS", "Statistics", "statistics"]
