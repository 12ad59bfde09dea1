"""`jfed plan`: what a run needs on a GPU or TPU, told by compiling for it on a CPU."""
