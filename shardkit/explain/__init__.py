"""What the compiler really did with a program, and how its state lies on a mesh."""
