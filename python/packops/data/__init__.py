"""Documents on their way to the model: packing, sampling, streaming and collating them.

Users import the public names from ``packops`` itself.
"""
