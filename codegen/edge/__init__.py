"""Running an artifact without Python: a small C++ runner, for boards and for qemu."""
