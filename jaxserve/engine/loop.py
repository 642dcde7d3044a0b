"""The engine: takes requests in, turns the step loop, sends tokens out.

One thread owns it. Each turn plans and launches step n + 1 before the tokens of step n are read,
so the device never waits for the host; sampled tokens stay on the device as the next step's input.
What one step of delay means:

- *Stop tokens* are seen when step n is read, while n + 1 (or several decode steps) already runs
  for the sequence. What that samples is discarded when it is read, and counted as discarded.
- *max_tokens* is known beforehand: a sequence leaves the decoding rows in the plan after the one
  that launched its last token, with its slot and its pages; nothing is over-run. Its tokens are
  still to be read then (state RETIRED), by the owner list that each launched plan keeps.
- *Cancel* works like a stop token: at once for the client, its pages and slot are free for the
  next plan, and what is launched for it is discarded.
- *Page release.* Pages of an ended or preempted sequence may be handed out in the next plan though
  a launched step still writes to them: device calls form one chain, each takes the cache that the
  one before returned, so the new owner's writes come after. Within one call no row reads a page
  that the call's other rows were given (see `scheduler.pages`).
- *Preemption.* A preempted sequence's launched tokens are still read and sent. It is let in again
  only when they have been, since it goes on from the known tokens, be its pages loaded from the
  host or computed again. They are saved before the plan's step, so after all launched ones.
- *Grammars.* Which token may come next is known once the one before has been read. The next
  step's model runs meanwhile, and its tokens are sampled by a program of their own, launched when
  the masks are made (`engine.grammars`). Plain rows of such a step are sampled with the others.
- *Embedding* (`engine.embedding`) is another kind of step: where both kinds have work they take
  turns. It stands in the same line on the device, and what was launched before it is read first.
- *Several decode steps* in one call happen only when nobody waits, no prompt is being computed and
  no row ends within them; stop tokens then cost up to two calls' worth of discarded tokens.

Invariants: every sequence let in gets exactly one `Finished`. A fault in a step ends all of them
with reason ERROR and the loop with the exception; the process then exits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable

from jaxserve.config import EmbeddingsConfig, SchedulerConfig, StructuredConfig
from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.attribution import Dividing, NoAttribution
from jaxserve.engine.backlog import Backlog
from jaxserve.engine.check import request_number
from jaxserve.engine.comeback import Comebacks
from jaxserve.engine.embedding import Embedding
from jaxserve.engine.garbage import Collector, NoCollector
from jaxserve.engine.grammars import Grammars
from jaxserve.engine.live import LiveSequences
from jaxserve.engine.lobby import Lobby
from jaxserve.engine.outbox import Outbox
from jaxserve.engine.probation import Probation
from jaxserve.engine.recorder import NoRecorder, Recorder
from jaxserve.engine.statistics import Statistics, prefill_tokens
from jaxserve.engine.status import Status
from jaxserve.engine.submission import submit_prompt
from jaxserve.engine.turn import Batch, Executor, InFlight, TextsInFlight
from jaxserve.errors import ConfigError, DeviceFailure, GrammarError, JaxserveError, Overloaded
from jaxserve.protocol.messages import (
    Cancel,
    ClientMessage,
    Drain,
    Embed,
    GetStatus,
    Goodbye,
    Submit,
    UseVocabulary,
)
from jaxserve.protocol.server import ServerTransport
from jaxserve.protocol.status import EngineStatus
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.copies import Schedulers
from jaxserve.scheduler.embedding import Text
from jaxserve.scheduler.plan import Plan
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import DeviceInfo, FinishReason, ModelInfo

logger = logging.getLogger(__name__)

#: How long an idle engine waits for a message before it looks around.
IDLE_WAIT_S = 0.5
#: The same while a grammar is compiled or an adapter loaded, whose end is no message.
LOAD_WAIT_S = 0.002


class Engine:
    """A model being served: scheduler, batch and executor behind a transport.

    Args:
        model: what is served.
        scheduler, batch, executor: the three parts of a step.
        server: the road to the clients.
        recorder: told what runs, for whoever watches this process.
        probation: which requests have to wait for what ended the engine before to be found.
        grammars: of requests whose output must match one.
        embedding: the other kind of step.
        adapters: which requests have to wait for their LoRA adapter; none where None.
        attribution: divides the device's time over sequences; none where None.
        collector: told when there is time for garbage; Python decides itself where None.
        device: what the executor runs on; None where that is nothing to tell.

    Attributes:
        in_flight: the step that runs on the device.
        state: "ready", "draining" or "failed".
        step_ns: when the loop last turned.
    """

    def __init__(
        self,
        model: ModelInfo,
        scheduler: Schedulers,
        batch: Batch,
        executor: Executor,
        server: ServerTransport,
        recorder: Recorder | None = None,
        probation: Probation | None = None,
        grammars: Grammars | None = None,
        embedding: Embedding | None = None,
        adapters: RequestAdapters | None = None,
        attribution: Dividing | None = None,
        collector: Collector | None = None,
        device: DeviceInfo | None = None,
    ) -> None:
        self._recorder = recorder or NoRecorder()
        self._adapters = adapters or RequestAdapters()
        self._grammars = grammars or Grammars(StructuredConfig(), model)
        self._lobby = Lobby(
            *(model, probation or Probation((), (), 0, self._recorder)),
            *(self._adapters, self._grammars, self._recorder),
        )
        self.scheduler = scheduler
        self.batch = batch
        self.executor = executor
        self.in_flight: InFlight | TextsInFlight | None = None
        self.state = "ready"
        self.step_ns = time.monotonic_ns()
        self._model = model
        self._server = server
        self._outbox = Outbox(server)
        self._backlog = Backlog()
        self._statistics = Statistics(scheduler, executor)
        self._embedding = embedding or Embedding(
            None, EmbeddingsConfig(), SchedulerConfig(), self._recorder
        )
        self._attribution = attribution or NoAttribution()
        self._collector = collector or NoCollector()
        self._live = LiveSequences(self._outbox, self._backlog, self._adapters, self._attribution)
        self._status = Status(
            model,
            device,
            scheduler=scheduler,
            executor=executor,
            lobby=self._lobby,
            adapters=self._adapters,
            backlog=self._backlog,
            embedding=self._embedding,
        )
        self._comebacks = Comebacks(lambda: self._backlog.rate(scheduler.num_running))
        self._texts_comebacks = Comebacks(lambda: self._embedding.rate)
        self._texts_next = True
        self._stopping = False
        self._error = ""

    # ------------------------------------------------------------------ the loop

    def step(self) -> None:
        """One turn: plan and launch the next step, then read and send the one before."""
        self.step_ns = time.monotonic_ns()
        self._recorder.turned()
        launched = self._launch_next()
        if launched is not None:
            self._collector.launched()
        match self.in_flight:
            case InFlight() as step:
                self._deliver(step)
            case TextsInFlight() as step:
                self._deliver_texts(step)
        if isinstance(launched, InFlight) and any(inputs.masked for inputs in launched.inputs):
            self._mask(launched)
        self.in_flight = launched

    def serve(self) -> None:
        """Turns the loop until `stop`. Raises what a step raised, after telling the clients."""
        try:
            while not self._stopping:
                work = self.scheduler.has_work or self._embedding.num_waiting
                idle = self.in_flight is None and not work
                wait_s = LOAD_WAIT_S if self._lobby.is_loading else IDLE_WAIT_S
                if idle:
                    self._collector.idle()
                self.receive(wait_s if idle else 0.0)
                self.step()
        except Exception as error:
            self._fail(error)
            raise

    def stop(self) -> None:
        """Has `serve` return after the turn it is in. May be called from elsewhere."""
        self._stopping = True

    def _launch_next(self) -> InFlight | TextsInFlight | None:
        """Launches the next step: where texts wait and something is generated, each in turn."""
        texts = None
        if self._texts_next and self._embedding.num_waiting:
            texts = self._embedding.launch(shared=self.scheduler.has_work)
        self._texts_next = texts is None
        if texts is not None:
            return texts
        plans = self.scheduler.plan()
        if plans is not None:
            return self._launch(plans)
        return self._embedding.launch(shared=False)

    def _launch(self, plans: list[Plan | None]) -> InFlight:
        inputs = self.batch.build(plans)
        self._recorder.launching(plans, inputs)
        launched = self.executor.launch(inputs)
        if self.in_flight is None:
            self._backlog.wake(self.step_ns)
        accounts = self._attribution.launched(plans, inputs, self.scheduler.owners)
        return InFlight(plans, inputs, launched, accounts)

    def _deliver(self, step: InFlight) -> None:
        """Reads a step's tokens and sends each client its own."""
        outputs = self.executor.collect(step.launched)
        self._recorder.collected()
        now_ns = time.monotonic_ns()
        rows = [inputs.num_decode_rows for inputs in step.inputs]
        commits: list[Commit | None] = [None] * len(step.inputs)
        self.scheduler.measured(step.plans, rows, outputs[0].device_ns, outputs[0].idle_ns)
        for copy, (plan, own, brought) in enumerate(
            zip(step.plans, step.inputs, outputs, strict=True)
        ):
            if plan is None:
                continue
            num_rows = own.num_live_rows
            rows = own.rows[:num_rows].tolist()
            sampled = brought.token_ids[:, :num_rows].T.tolist()
            commit = self.scheduler.commit(
                copy, rows, sampled, device_ns=brought.device_ns, page_ns=brought.page_ns
            )
            step.drafted += commit.num_drafted
            step.accepted += commit.num_accepted
            self._outbox.add_step(plan.step_id, now_ns, commit, own, brought)
            commits[copy] = commit
        self._attribution.divide(step, outputs, commits)
        for commit in filter(None, commits):
            for sequence in commit.finished:
                self._live.finish(sequence, now_ns)
        self._outbox.send()
        self._backlog.step(now_ns, prefill_tokens(step.plans))
        if self._outbox.wants_stats:
            self._outbox.send_stats(self._statistics.of(step, outputs[0]))

    def _mask(self, step: InFlight) -> None:
        """Has a launched step sample by masks, now that the tokens before it are known."""
        masks, failed = self._grammars.masks(step.inputs, self.scheduler.owners)
        step.launched = self.executor.sample(step.launched, masks)
        self._give_up(failed)

    def _give_up(self, failed: list[tuple[Sequence, GrammarError]]) -> None:
        """Ends sequences that their grammars cannot be held to."""
        now_ns = time.monotonic_ns()
        for sequence, error in failed:
            self.scheduler.cancel(sequence, FinishReason.ERROR)
            self._live.finish(sequence, now_ns, error)

    def _deliver_texts(self, step: TextsInFlight) -> None:
        """Reads an embedding step's vectors and sends each client its own."""
        outputs = self._embedding.collect(step)
        self._recorder.collected()
        self._attribution.divide_texts(step.texts, self._embedding.shares(step), outputs.device_ns)
        self._embedding.deliver(step, outputs, time.monotonic_ns(), self._live.finish)
        self._outbox.send()
        if self._outbox.wants_stats:
            work = self._embedding.count_work(step)
            self._outbox.send_stats(self._statistics.of_texts(step, outputs, work))

    # ------------------------------------------------------------------ messages

    def receive(self, timeout_s: float) -> None:
        """Handles what clients sent, waiting at most `timeout_s` for the first message."""
        for client, message in self._server.receive(timeout_s):
            if message is not None:
                self.handle(client, message)
        for client, request, error in self._lobby.release():
            if error is None:
                self._schedule(client, request)
            else:
                self._live.refuse(client, request, error)
        self._outbox.send()

    def greet(self, clients: dict[Hashable, bool]) -> None:
        """Tells clients that came during start-up that the engine serves now.

        Args:
            clients: whether each wants step statistics.
        """
        for client, stats in clients.items():
            self.handle(client, GetStatus(stats=stats))

    def handle(self, client: Hashable, message: ClientMessage) -> None:
        """One message of one client. Whatever it holds, it harms nobody else."""
        match message:
            case Submit() | Embed():
                self.submit(client, message)
            case Cancel():
                self.cancel(client, message.sequence_ids, message.reason)
            case Drain():
                self.drain()
            case GetStatus():
                self._outbox.subscribe(client, message.stats)
                status = self.status()
                status.answers = message.number
                self._server.send(client, status)
            case Goodbye():
                self.cancel(client, list(self._live.of(client)), FinishReason.CANCELLED)
                self._lobby.forget(client)
                self._live.forget(client)
                self._outbox.forget(client)
            case UseVocabulary():
                self._use(message)

    def submit(self, client: Hashable, message: Submit | Embed) -> None:
        """Lets a request in, has it wait, or refuses it: each sequence ends with the error."""
        try:
            if self.state != "ready" and message.attempt == 0:
                self._status.shed["draining"] += len(message.sequence_ids)
                raise Overloaded(f"the engine is {self.state} and takes no new requests")
            if self._lobby.holds(client, message):
                return
        except JaxserveError as error:
            self._live.refuse(client, message, error)
        else:
            self._schedule(client, message)

    def _schedule(self, client: Hashable, message: Submit | Embed) -> None:
        """Gives a request to the queue of its kind, or refuses it."""
        if self._live.knows(client, message.sequence_ids):
            logger.warning("client %s used a sequence id twice: request dropped", client)
            self._lobby.refused(message)
            return
        try:
            self._recorder.arriving(request_number(message.request_key))
            if isinstance(message, Embed):
                sequences = self._embedding.submit(client, message)
            else:
                sequences = submit_prompt(
                    self.scheduler, client, message, self._model, self._adapters
                )
                self._backlog.enter(sequences, message.priority, message.tenant, message.weight)
        except JaxserveError as error:
            self._lobby.refused(message)
            comebacks = self._texts_comebacks if isinstance(message, Embed) else self._comebacks
            comebacks.tell(error, len(message.sequence_ids))
            self._live.refuse(client, message, error)
        else:
            self._live.enter(client, message, sequences)
            self._lobby.let_in(message, sequences)
            if isinstance(message, Submit):
                self._give_up(self._grammars.constrain(message, sequences))
        self._recorder.arriving(0)
        now_ns = time.monotonic_ns()
        for sequence, error in self.scheduler.take_shed():
            self._comebacks.tell(error, 1)
            self._live.finish(sequence, now_ns, error)
        for sequence, error in self._embedding.take_shed():
            self._texts_comebacks.tell(error, 1)
            self._live.finish(sequence, now_ns, error)

    def cancel(self, client: Hashable, sequence_ids: list[int], reason: FinishReason) -> None:
        """Ends those of a client's sequences that still live."""
        live = self._live.of(client)
        now_ns = time.monotonic_ns()
        for sequence_id in sequence_ids:
            sequence = live.get(sequence_id)
            if sequence is not None:
                owner = self._embedding if isinstance(sequence, Text) else self.scheduler
                owner.cancel(sequence, reason)
                self._live.finish(sequence, now_ns)
        waiting = self._lobby.withdraw(client, sequence_ids, reason)
        if waiting:
            self._outbox.events(client).finished.extend(waiting)

    def _use(self, message: UseVocabulary) -> None:
        try:
            self._grammars.use(message.vocabulary)
        except ConfigError as error:
            logger.warning("%s", error.message)

    def drain(self) -> None:
        """Refuses new requests from now on."""
        if self.state == "ready":
            self.state = "draining"

    def status(self) -> EngineStatus:
        """The engine's state, now."""
        return self._status.of(self.state, self.step_ns, self._error)

    def _fail(self, cause: Exception) -> None:
        """Ends every sequence with the error and says "failed" to every client."""
        self.state = "failed"
        self._error = f"the engine's step failed: {type(cause).__name__}: {cause}".split("\n")[0]
        self._live.finish_all(DeviceFailure(self._error))
        self._outbox.send()
        for client in self._live.clients:
            self._server.send(client, self.status())
