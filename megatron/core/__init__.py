"""The library: parallel layers, data sets, optimizer and file formats, without argparse, environment or globals."""
