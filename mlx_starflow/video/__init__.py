"""Videos: requests, their frames one by one, and video files."""
