"""The embedded base: a small, real latent diffusion model of landscapes that the package draws itself."""
