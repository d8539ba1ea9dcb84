"""Training. Start reading in train.py, the one public function, then trainer.py, the loop."""
