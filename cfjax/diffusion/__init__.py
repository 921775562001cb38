"""The noise axis: schedules, the diffusion process, loss weighting and solvers."""
