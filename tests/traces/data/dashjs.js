// smooth changes
const PROFILE_CASCADE = [
  {
    speed: 1200,
    duration: 30
  },
  { speed: 800, duration: 0.250, },
];
const PROFILE_SPIKE = [{"speed": 500, "duration": 10}];
module.exports = { PROFILE_CASCADE, PROFILE_SPIKE };
