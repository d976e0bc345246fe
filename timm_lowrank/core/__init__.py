"""The method itself, on torch alone: branch, factored W, rank projections, capture of activations, spectra."""
