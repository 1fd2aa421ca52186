"""What runs the teacher; knows no corpus."""
