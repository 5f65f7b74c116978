"""Token files, training samples, blends and the order they are read in.

Nothing is imported here, so that the tools that write token files start without what training needs.
"""
