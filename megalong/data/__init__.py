"""From text to the tokens of one rank: packing, the data folder, the order of samples, the loader, the cursor."""
