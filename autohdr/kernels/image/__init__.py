"""What the image ops share in Triton, cut along the same vocabulary as csrc/common's cpu_*.h:

view       images in memory, as kernels take them
steps      how an op walks its images, and memory for a step
norm       layer norm over the channels
repack     weights and sums in the order that kernels want
depthwise  the 3×3 convolution, and the gates that follow it
product    matrix products between pixels and channels
expansion  norm, 1×1 and 3×3, which both ops begin with

Images are NHWC. Every sum has a fixed order: a program adds to its own slot, and slots are added up in order.
"""
