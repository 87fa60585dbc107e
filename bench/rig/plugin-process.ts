// The protected side of the bench, a process of its own so that its CPU time and memory can be told apart: the product's capture
// workers, a thread per VM, and the schedule of checkpoints. Ends when the bench does.
import { randomBytes } from 'node:crypto'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { CaptureWorker, GroupClock } from '../../plugin/capture/index.ts'
import type { CaptureEvent } from '../../plugin/capture/index.ts'
import { CheckpointLabels, cutOnOneNode, scheduleCheckpoints } from '../../plugin/checkpoint/index.ts'
import type { CheckpointSamples, FromPlugin, StartCapture, ToPlugin } from './plugin-messages.ts'

type Captured = { worker: CaptureWorker; clock: GroupClock; vpg: string; validAtUnixMs: number; waiting: Map<string, { cutMs: number; onValid: (lagMs: number) => void }> }

const tell = (message: FromPlugin): void => void process.send?.(message)
const captured = new Map<string, Captured>()
const labels = new CheckpointLabels()
let schedule: { samples: CheckpointSamples; stop: () => void } | undefined

const of = (vm: string): Captured => {
  const one = captured.get(vm)
  if (one === undefined) throw new CdpError('NOT_FOUND', `VM ${vm} is not captured`)
  return one
}

const onEvent = (vm: string, event: CaptureEvent): void => {
  const one = captured.get(vm)
  const valid = event.is === 'news' ? event.news.validCheckpoint : undefined
  if (one !== undefined && valid !== undefined) {
    one.validAtUnixMs = Math.max(one.validAtUnixMs, valid.atUnixMs)
    const waiting = one.waiting.get(valid.id)
    one.waiting.delete(valid.id)
    if (waiting !== undefined) waiting.onValid(performance.now() - waiting.cutMs)
  }
  if (event.is !== 'news') tell({ vm, event })
}

const start = async ({ vm, vpg, targetPath, sizeBytes, budgetBytes, pairing }: StartCapture): Promise<void> => {
  const clock = new GroupClock()
  const worker = await CaptureWorker.start({
    vm, vpg, vms: [vm], targetPath, disks: [{ disk: 0, key: 'scsi0', sizeBytes }], agent: { host: pairing.host, port: pairing.port, tls: pairing.tls },
    groupClock: clock.buffer, budgetBytes, lingerMs: 10, slowAck: { p99Ms: Infinity, maxMs: Infinity },
    onEvent: (event) => onEvent(vm, event),
    onExit: () => undefined,
  })
  captured.set(vm, { worker, clock, vpg, validAtUnixMs: 0, waiting: new Map() })
}

const cut = async (vm: string, onValid: (lagMs: number) => void): Promise<{ id: string } | { refused: string }> => {
  const one = of(vm)
  const id = randomBytes(8).toString('hex')
  one.waiting.set(id, { cutMs: performance.now(), onValid })
  const mark = { id, vpg: one.vpg, vms: [vm], atUnixMs: labels.next(Date.now()), kind: 'automatic' as const }
  const outcome = await cutOnOneNode(one.clock, [one.worker], mark)
  if (outcome.ok) return { id }
  one.waiting.delete(id)
  return { refused: outcome.why }
}

const checkpoint = async (vm: string): Promise<string> => {
  const { promise, resolve } = Promise.withResolvers<number>()
  const outcome = await cut(vm, resolve)
  if ('refused' in outcome) throw new CdpError('CONFLICT', `the cut was refused: ${outcome.refused}`)
  await promise
  return outcome.id
}

const beginCheckpoints = (vm: string, everyMs: number, sampleEveryMs: number): void => {
  const samples: CheckpointSamples = { rpoMs: [], lagMs: [], abandoned: 0 }
  const one = of(vm)
  one.validAtUnixMs = 0
  const task = scheduleCheckpoints(everyMs, silentLogger, async () => {
    if ('refused' in (await cut(vm, (lagMs) => samples.lagMs.push(lagMs)))) samples.abandoned++
  })
  const sampler = setInterval(() => {
    if (one.validAtUnixMs > 0) samples.rpoMs.push(Date.now() - one.validAtUnixMs)
  }, sampleEveryMs)
  schedule = {
    samples,
    stop: () => {
      clearInterval(sampler)
      task[Symbol.dispose]()
    },
  }
}

const answer = async (request: ToPlugin): Promise<unknown> => {
  switch (request.do) {
    case 'start': return start(request.with)
    case 'stop': {
      const { worker } = of(request.vm)
      captured.delete(request.vm)
      return worker[Symbol.asyncDispose]()
    }
    // Names and shapes are checked on the bench's side, where the request is made.
    case 'ask': return of(request.vm).worker.ask(request.name, request.ask as never)
    case 'checkpoint': return checkpoint(request.vm)
    case 'beginCheckpoints': return beginCheckpoints(request.vm, request.everyMs, request.sampleEveryMs)
    case 'endCheckpoints': {
      schedule?.stop()
      return schedule?.samples
    }
  }
}

process.on('message', (request: ToPlugin) => {
  answer(request).then(
    (value) => tell({ id: request.id, answer: value }),
    (error: unknown) => tell({ id: request.id, error: errorMessage(error) }),
  )
})
// The bench ends us; a SIGINT for the whole group is its to handle.
process.on('SIGINT', () => undefined)
process.once('disconnect', () => process.exit(0))
tell({ ready: true })
