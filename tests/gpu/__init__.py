"""What a machine with a GPU shows: `bash tests/gpu.sh`. Each module but `part` and `page` is one part, a process of its
own."""
