"""What tools/doctor.py asks of a machine."""
