//! From what is asked for to a report: every wire and load, and under each the servers in turn, round by round.
//!
//! Before anything is timed, every different request is sent to every server once and its answer read whole: a request
//! that is refused is told as such, and what the answers hold is what later ones must.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::Told;
use super::arguments::{Arguments, Asked, Remote, Slo};
use super::connection::{Patience, several};
use super::data;
use super::echo::{self, Answers, Echo};
use super::in_process::Alone;
use super::load::{self, Load, Method, Outputs, Progress, Round, Span, Target};
use super::ramp::Search;
use super::report::{
    Cell, Environment, LoadSaid, Probe, Ramp, Ratio, Report, Role, Sent, Server, Settings, Side, Verdict, WarmUp,
};
use super::table::count;
use super::wire::{Encoded, Fault, Item, Reply, Wire, post};
use crate::cli::client::{Client, Failure, ModelMetadata};
use crate::cli::surroundings;
use crate::error::visible;

/// Of a round, the part before the measured window: until connections and queues are as they will be.
const LEAD: Duration = Duration::from_millis(200);

pub(super) struct Measurement<'a> {
    arguments: &'a Arguments,
    method: Method,
    loads: Vec<Load>,
    cores: usize,
    servers: Vec<Server>,
    sent: Vec<Sent>,
    /// For each wire, the servers that are measured in turn.
    wires: Vec<(Wire, Vec<(Role, Target)>)>,
    /// Takes turns with them.
    engine: Option<Alone>,
    /// Ends with the measurement.
    _echo: Option<Echo>,
    begun: Duration,
}

impl<'a> Measurement<'a> {
    /// Reads files, asks the servers for what has to be known, and tries every request.
    pub(super) fn prepare(arguments: &'a Arguments) -> Result<Measurement<'a>, Failure> {
        let cores = surroundings::read().cores;
        let mut measurement = Measurement {
            arguments,
            method: arguments.method(cores),
            loads: arguments.loads()?,
            cores,
            servers: Vec::new(),
            sent: Vec::new(),
            wires: Vec::new(),
            engine: None,
            _echo: None,
            begun: surroundings::now(),
        };
        if arguments.models().is_empty() {
            measurement.blank()?;
        } else {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| Failure::Usage(error.into()))?;
            runtime.block_on(measurement.try_out())?;
            runtime.shutdown_background();
        }
        Ok(measurement)
    }

    /// The echo alone, with bytes that mean nothing.
    fn blank(&mut self) -> Result<()> {
        let echo = Echo::spawn(&Answers::blank(self.arguments.response_bytes))?;
        let length = self.arguments.request_bytes;
        let mut addresses = Vec::new();
        for wire in &self.arguments.wires {
            let address = echo.ports.of(*wire);
            let request = match wire {
                Wire::Json => post(&address.to_string(), "/", "application/json", None, &vec![b'0'; length]),
                Wire::Binary => post(&address.to_string(), "/", "application/octet-stream", None, &vec![0; length]),
                Wire::Grpc => echo::framed(length).into(),
            };
            let target = Target {
                wire: *wire,
                address,
                host: address.to_string(),
                items: [Encoded(request)].into(),
                order: [0].into(),
                expected: [].into(),
                pid: Some(echo.pid()),
            };
            addresses.push(address.to_string());
            self.wires.push((*wire, vec![(Role::Echo, target)]));
        }
        self.servers.push(Server { role: Role::Echo, addresses });
        self._echo = Some(echo);
        Ok(())
    }

    async fn try_out(&mut self) -> Result<(), Failure> {
        let arguments = self.arguments;
        let (server, compared) = (arguments.server(), arguments.compared());
        let mut items = Vec::new();
        let mut counts = Vec::new();
        for asked in arguments.models() {
            let requests = self.requests(asked, &server).await?;
            counts.push((requests.len(), asked.weight));
            items.extend(requests);
        }
        let order: Arc<[u32]> = order(&counts).into();
        let mut answers = Answers { order: order.to_vec(), ..Answers::default() };
        let remotes = [(Role::Server, Some(&server)), (Role::Compared, compared.as_ref())];
        for wire in &arguments.wires {
            let mut sides = Vec::new();
            for (role, remote) in remotes.iter().filter_map(|(role, remote)| Some((*role, (*remote)?))) {
                let (target, replies) = self.target(*wire, remote, &items, &order).await?;
                if role == Role::Server {
                    answers.replies.push((*wire, replies));
                }
                sides.push((role, target));
            }
            self.wires.push((*wire, sides));
        }
        for (role, remote) in remotes.iter().filter_map(|(role, remote)| Some((*role, (*remote)?))) {
            let addresses = arguments.wires.iter().map(|wire| remote.address(*wire).to_string());
            let mut addresses: Vec<String> = addresses.collect();
            addresses.dedup();
            self.servers.push(Server { role, addresses });
        }
        if arguments.echo {
            self.add_echo(&answers)?;
        }
        if let Some((root, setting)) = arguments.engine_of.as_ref().zip(arguments.engine_layout) {
            let (config, cores) = arguments.engine.clone().registry(root.clone())?;
            self.engine = Some(Alone::load(&config, cores, setting, &items)?);
        }
        Ok(())
    }

    fn add_echo(&mut self, answers: &Answers) -> Result<()> {
        let echo = Echo::spawn(answers)?;
        let mut addresses = Vec::new();
        for (wire, sides) in &mut self.wires {
            let Some((_, measured)) = sides.first() else { continue };
            let (address, pid) = (echo.ports.of(*wire), Some(echo.pid()));
            // The very bytes that the server gets; what it answers is not looked at.
            let target = Target { address, pid, expected: [].into(), ..measured.clone() };
            addresses.push(address.to_string());
            sides.push((Role::Echo, target));
        }
        self.servers.push(Server { role: Role::Echo, addresses });
        self._echo = Some(echo);
        Ok(())
    }

    /// What one model is sent.
    async fn requests(&mut self, asked: &Asked, server: &Remote) -> Result<Vec<Item>, Failure> {
        let arguments = self.arguments;
        let files = arguments.data.as_deref().map(data::files).transpose()?;
        let signature = match files.as_ref().is_none_or(|files| files.iter().any(|file| data::is_array(file))) {
            true => Some(self.metadata(asked, server).await?),
            false => None,
        };
        let requests = match (&files, &signature) {
            (Some(files), signature) => data::read(files, signature.as_ref())?,
            (None, Some(signature)) => arguments.drawing().requests(signature)?,
            (None, None) => Vec::new(),
        };
        let inputs = requests.first().map(|request| {
            let input = |input: &crate::cli::client::request::Input| {
                format!("{} {} {}", input.name, input.tensor.dtype(), input.tensor.shape())
            };
            request.inputs.iter().map(input).collect()
        });
        self.sent.push(Sent {
            model: asked.name.clone(),
            version: asked.version.clone(),
            weight: asked.weight,
            requests: requests.len(),
            source: arguments.data.as_ref().map_or("drawn".into(), |path| format!("from {}", path.display())),
            inputs: inputs.unwrap_or_default(),
        });
        let item = |request| Item { model: asked.name.clone(), version: asked.version.clone(), request };
        Ok(requests.into_iter().map(item).collect())
    }

    async fn metadata(&self, asked: &Asked, server: &Remote) -> Result<ModelMetadata, Failure> {
        let rest = self.arguments.wires.iter().any(|wire| *wire != Wire::Grpc);
        let address = server.address(if rest { Wire::Json } else { Wire::Grpc });
        let mut client = Client::connect(address, self.method.timeout).await?;
        client.model(&asked.name, &asked.version).await
    }

    /// A server, every request to which was answered, and the answers.
    async fn target(
        &self,
        wire: Wire,
        remote: &Remote,
        items: &[Item],
        order: &Arc<[u32]>,
    ) -> Result<(Target, Vec<Reply>), Failure> {
        let named = remote.address(wire);
        let (address, host) = (named.resolved().await?, named.authority().to_string());
        let path = self.arguments.path.as_deref();
        let encoded = items.iter().map(|item| item.encoded(wire, &host, path)).collect::<Result<Vec<_>>>()?;
        let made = several(wire, address, &host, 1, 1).map_err(|error| Failure::Usage(error.into()))?;
        let Some(mut connection) = made.into_iter().next() else { return Err(anyhow!("no connection").into()) };
        let (mut replies, mut expected): (Vec<Reply>, Vec<Outputs>) = (Vec::new(), Vec::new());
        for (number, (item, request)) in items.iter().zip(&encoded).enumerate() {
            let mut reply = Reply::default();
            let call = connection.call(request, Some(&mut reply));
            let failed = |fault: Fault| {
                let what = format!("request {} to `{}`", number + 1, visible(&item.model));
                let detail = if fault.detail().is_empty() { String::new() } else { format!(": {}", fault.detail()) };
                let message = format!("{named} answered {what} over {wire} with {}{}", fault.kind(), visible(&detail));
                match fault {
                    Fault::Status(..) | Fault::Code(..) => Failure::Refused(message),
                    _ => Failure::NoAnswer(message),
                }
            };
            Patience::new(self.method.timeout).hold(Instant::now(), call).await.map_err(failed)?;
            let answer = reply.clone().decoded(wire).map_err(Fault::Malformed).map_err(failed)?;
            expected.push(load::outputs(&answer));
            replies.push(reply);
        }
        let (items, order) = (encoded.into(), Arc::clone(order));
        Ok((Target { wire, address, host, items, order, expected: expected.into(), pid: remote.pid }, replies))
    }

    pub(super) fn run(mut self, told: &mut Told) -> Result<Report> {
        let (mut cells, mut ramps) = (Vec::new(), Vec::new());
        let mut engine = self.engine.take();
        for (wire, sides) in &self.wires {
            if let Some(slo) = self.arguments.slo.filter(|_| self.arguments.ramp) {
                for (role, target) in sides {
                    ramps.push(self.ramp(*wire, slo, *role, target, told)?);
                }
                continue;
            }
            for load in &self.loads {
                cells.push(self.cell(*wire, load, sides, engine.as_mut(), told)?);
            }
        }
        let environment = Environment::read(self.cores, self.begun);
        let verdict = verdict(self.arguments, &cells, &ramps);
        Ok(Report {
            servers: self.servers,
            models: self.sent,
            cells,
            ramps,
            verdict,
            ..Report::empty(environment, Settings::of(self.arguments, &self.method))
        })
    }

    fn cell(
        &self,
        wire: Wire,
        load: &Load,
        sides: &[(Role, Target)],
        mut engine: Option<&mut Alone>,
        told: &mut Told,
    ) -> Result<Cell> {
        let load_said = LoadSaid::from(load);
        let mut warm_ups = Vec::new();
        for (role, target) in sides {
            let longest = self.arguments.warm_up;
            let name = format!("{wire}, {}, {}: warming up", load_said.text(), role.name());
            warm_ups.push(match longest.is_zero() {
                true => None,
                false => {
                    let span = Span::WarmUp { longest };
                    let round = self.round(target, load, span, 0, &name, told)?;
                    Some(WarmUp { seconds: round.seconds, steady: round.steady })
                }
            });
        }
        let span = Span::Measured { lead: LEAD, length: self.arguments.duration };
        let mut runs = Vec::new();
        let mut rounds: Vec<Vec<Round>> = sides.iter().map(|_| Vec::new()).collect();
        for number in 0..self.arguments.rounds {
            for position in turn(sides.len(), number) {
                let (role, target) = &sides[position];
                let name = format!(
                    "{wire}, {}, {}: round {} of {}",
                    load_said.text(),
                    role.name(),
                    number + 1,
                    self.arguments.rounds
                );
                rounds[position].push(self.round(target, load, span, number, &name, told)?);
            }
            if let Some(engine) = &mut engine {
                told.tell(&format!("the engine alone: round {} of {}", number + 1, self.arguments.rounds));
                runs.push(engine.round(self.arguments.duration)?);
            }
        }
        let engine = engine.map(|engine| engine.timed(&runs)).transpose()?;
        let measured: Vec<Side> = sides
            .iter()
            .zip(warm_ups)
            .zip(&rounds)
            .map(|(((role, _), warm_up), rounds)| Side::of(*role, warm_up, rounds))
            .collect();
        let ratios = match &measured[..] {
            [first, others @ ..] => others.iter().map(|other| Ratio::of(first, other)).collect(),
            [] => Vec::new(),
        };
        Ok(Cell { protocol: wire, load: load_said, sides: measured, ratios, engine })
    }

    fn ramp(&self, wire: Wire, slo: Slo, role: Role, target: &Target, told: &mut Told) -> Result<Ramp> {
        let pattern = self.arguments.pattern()?;
        let mut search = Search::from(self.arguments.first_rate());
        let mut probes = Vec::new();
        let open = |rate: f64| Load::Open { rate, pattern: pattern.clone() };
        if !self.arguments.warm_up.is_zero() {
            let span = Span::WarmUp { longest: self.arguments.warm_up };
            let name = format!("{wire}, {}: warming up", role.name());
            self.round(target, &open(self.arguments.first_rate()), span, 0, &name, told)?;
        }
        while let Some(rate) = search.next() {
            let span = Span::Measured { lead: LEAD, length: self.arguments.duration };
            let name = format!("{wire}, {}: does {}/s meet {slo}?", role.name(), count(rate));
            // What a disturbance made miss is tried again: two of three decide.
            let (mut tries, mut missed) = (0, 0);
            let met = loop {
                let round = self.round(target, &open(rate), span, probes.len(), &name, told)?;
                let probe = Probe::of(rate, slo.quantile, slo.limit, &round);
                tries += 1;
                missed += usize::from(!probe.met);
                probes.push(probe);
                if missed == 2 || missed == 0 || tries == 3 {
                    break missed < 2;
                }
            };
            search.tell(rate, met);
        }
        Ok(Ramp { protocol: wire, role, rate: search.found(), probes })
    }

    fn round(
        &self,
        target: &Target,
        load: &Load,
        span: Span,
        number: usize,
        name: &str,
        told: &mut Told,
    ) -> Result<Round> {
        told.tell(name);
        let mut last = (Duration::ZERO, 0);
        load::run(target, load, &self.method, span, number, |progress: &Progress| {
            let seconds = (progress.elapsed - last.0).as_secs_f64();
            let rate = (progress.answers - last.1) as f64 / seconds;
            last = (progress.elapsed, progress.answers);
            let errors = if progress.faults > 0 { format!(", {} errors", progress.faults) } else { String::new() };
            told.tell(&format!("{name}, {} answers/s{errors}", count(rate)));
        })
    }
}

/// Errors of a ramp's probes are what it looks for, and not counted.
fn verdict(arguments: &Arguments, cells: &[Cell], ramps: &[Ramp]) -> Verdict {
    let sides = || cells.iter().flat_map(|cell| &cell.sides);
    let met = |slo: Slo| {
        let measured =
            sides().filter(|side| side.role == Role::Server).all(|side| side.within(slo.quantile, slo.limit));
        measured && ramps.iter().filter(|ramp| ramp.role == Role::Server).all(|ramp| ramp.rate.is_some())
    };
    Verdict {
        errors: sides().map(Side::failures).sum(),
        unanswered: sides().filter(|side| side.answers == 0).count(),
        max_errors: arguments.max_errors,
        slo: arguments.slo.map(|slo| slo.to_string()),
        slo_ms: arguments.slo.map(|slo| slo.limit.as_secs_f64() * 1e3),
        slo_met: arguments.slo.map(met),
    }
}

/// The order of `sides` servers in a round: each begins as often as the others.
fn turn(sides: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..sides).map(move |position| (position + round) % sides)
}

/// Positions of all models' items, one behind the other, so that each model gets its share by weight and sends its
/// items in turn.
fn order(models: &[(usize, usize)]) -> Vec<u32> {
    let total: usize = models.iter().map(|(_, weight)| weight).sum();
    let longest = models.iter().map(|(items, _)| *items).max().unwrap_or(1);
    let starts: Vec<usize> =
        models.iter().scan(0, |sum, (items, _)| Some(std::mem::replace(sum, *sum + items))).collect();
    let (mut credit, mut next) = (vec![0i64; models.len()], vec![0; models.len()]);
    let mut order = Vec::with_capacity(total * longest);
    for _ in 0..total * longest {
        // Smooth weighted round robin: the one with the most credit goes, and pays for all.
        for (credit, (_, weight)) in credit.iter_mut().zip(models) {
            *credit += *weight as i64;
        }
        let Some(chosen) = (0..models.len()).max_by_key(|model| (credit[*model], usize::MAX - model)) else { break };
        credit[chosen] -= total as i64;
        order.push(u32::try_from(starts[chosen] + next[chosen] % models[chosen].0.max(1)).unwrap_or(0));
        next[chosen] += 1;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_get_their_shares_and_all_of_their_items() {
        assert_eq!(order(&[(3, 1)]), [0, 1, 2]);
        assert_eq!(order(&[(1, 2), (2, 1)]), [0, 1, 0, 0, 2, 0]);
        let order = order(&[(2, 5), (4, 1)]);
        assert_eq!(order.iter().filter(|item| **item < 2).count(), order.len() * 5 / 6);
        assert!((0..6).all(|item| order.contains(&item)));
    }

    #[test]
    fn every_server_begins_as_often() {
        assert_eq!(turn(2, 0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(turn(2, 1).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(turn(3, 4).collect::<Vec<_>>(), [1, 2, 0]);
    }
}
