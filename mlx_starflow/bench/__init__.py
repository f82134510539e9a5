"""How fast sampling is: contenders timed side by side, their traffic, and estimates for chips."""
