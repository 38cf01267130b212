"""`vltrain importance`: where AdaLoRA has left how much of its rank, in one run or in several side by side."""
