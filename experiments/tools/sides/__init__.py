"""One step of alignment by fjax and by others, on the same tokens, each in a process of its own."""
