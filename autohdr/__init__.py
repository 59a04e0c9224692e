"""autohdr: kernels, models and a trainer that turn unedited real-estate photos into edited, HDR-looking ones."""

__version__ = "0.1.0"
