"""Looking at what happens: tables of modules and bytes, plots."""
