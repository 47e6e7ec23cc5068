"""The sampling loop around the transformer: guidance, solver, timesteps and resolution.

Methods in this room decide how often, at which timesteps and with which guidance the transformer is called. They attach
at the step seam and the model seam, know nothing of the inside of a block, and register with `dita.registry` like every
other method. Version 0.1 has none yet.
"""
