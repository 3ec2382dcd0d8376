"""TE definitions of the kernels; block names tell the schedule rules what they see."""
