"""What the compilers make of the kernels: registers, spills, instructions, occupancy; and tile sizes to choose from."""
