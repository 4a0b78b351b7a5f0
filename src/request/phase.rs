/// The life of the process, in order. Published on a watch channel by `server`; the order is part of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    Starting,
    Loading,
    /// Every version found at start is ready or has failed.
    Ready,
    /// Told to stop: not ready any more, still serving, so that load balancers can look away.
    LameDuck,
    /// Accepts nothing new, serves what was accepted.
    Draining,
    Stopping,
    Stopped,
}

impl Phase {
    pub fn label(self) -> &'static str {
        match self {
            Phase::Starting => "starting",
            Phase::Loading => "loading",
            Phase::Ready => "ready",
            Phase::LameDuck => "lame_duck",
            Phase::Draining => "draining",
            Phase::Stopping => "stopping",
            Phase::Stopped => "stopped",
        }
    }

    /// Whether requests are admitted. Versions that are ready serve while others still load.
    pub fn admits(self) -> bool {
        matches!(self, Phase::Loading | Phase::Ready | Phase::LameDuck | Phase::Draining)
    }
}
