import { spawn, type ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { CdpError } from '../../core/errors/index.ts'
import { tool } from './process.ts'
import { projectDir } from './project.ts'

/** A program in the network of one of the two sites: put this before it. */
export type NetworkPlace = readonly string[]

export type LinkOptions = {
  /** Each way; 0 by default. */
  delayMs?: number
}

/**
 * A line between two sites: two network namespaces and a veth pair, so that it can be cut, slowed down and made to lose packets without touching
 * the machine's own network. Rate by tc tbf, loss by iptables, delay by two TUN devices and a program between them: netem is not in every kernel.
 */
export class Link implements AsyncDisposable {
  readonly protectedSite: NetworkPlace
  readonly recoverySite: NetworkPlace
  /** Where the protected site reaches the recovery site. */
  readonly recoveryHost: string
  readonly #ends: readonly { namespace: string; device: string }[]
  #delayLine: ChildProcess | undefined

  private constructor(ends: readonly { namespace: string; device: string }[], recoveryHost: string) {
    this.#ends = ends
    const [near, far] = ends.map(({ namespace }) => ['ip', 'netns', 'exec', namespace])
    this.protectedSite = near
    this.recoverySite = far
    this.recoveryHost = recoveryHost
  }

  static async create({ delayMs = 0 }: LinkOptions = {}): Promise<Link> {
    const id = randomBytes(3).toString('hex')
    const third = randomBytes(1)[0]
    const hosts = [`10.213.${third}.1`, `10.213.${third}.2`]
    const ends = ['p', 'r'].map((side) => ({ namespace: `cdp-${side}-${id}`, device: `cdp${side}${id}` }))
    const link = new Link(ends, hosts[1])
    try {
      for (const { namespace } of ends) await tool('ip', ['netns', 'add', namespace])
      await (delayMs > 0 ? link.#makeDelayLine(delayMs) : link.#makeWire())
      for (const [at, { namespace, device }] of ends.entries()) {
        await tool('ip', ['-n', namespace, 'addr', 'add', `${hosts[at]}/30`, ...(delayMs > 0 ? ['peer', `${hosts[1 - at]}/30`] : []), 'dev', device])
        for (const one of ['lo', device]) await tool('ip', ['-n', namespace, 'link', 'set', one, 'up'])
      }
      return link
    } catch (error) {
      await link[Symbol.asyncDispose]()
      throw error
    }
  }

  /** Nothing passes any more, and nobody is told. */
  async cut(): Promise<void> {
    await this.#drop([])
  }

  /** That share of packets is lost, both ways. */
  async lose(share: number): Promise<void> {
    await this.#drop(['-m', 'statistic', '--mode', 'random', '--probability', String(share)])
  }

  /** Bits per second, both ways. */
  async slow(bitsPerSec: number): Promise<void> {
    for (const { namespace, device } of this.#ends) await tool('tc', ['-n', namespace, 'qdisc', 'replace', 'dev', device, 'root', 'tbf', 'rate', `${bitsPerSec}bit`, 'burst', '32kb', 'latency', '400ms'])
  }

  /** As it was made. */
  async heal(): Promise<void> {
    await this.pass()
    for (const { namespace, device } of this.#ends) await tool('tc', ['-n', namespace, 'qdisc', 'del', 'dev', device, 'root']).catch(() => undefined)
  }

  /** Nothing is cut or lost any more; a rate stays. */
  async pass(): Promise<void> {
    for (const { namespace } of this.#ends) await tool('ip', ['netns', 'exec', namespace, 'iptables', '-F'])
  }

  /** Both namespaces, and with them the line. What runs in them is ended before. */
  async [Symbol.asyncDispose](): Promise<void> {
    const line = this.#delayLine
    if (line !== undefined && line.exitCode === null && line.signalCode === null) {
      line.kill('SIGKILL')
      await once(line, 'exit')
    }
    for (const { namespace } of this.#ends) await tool('ip', ['netns', 'del', namespace]).catch(() => undefined)
  }

  async #makeWire(): Promise<void> {
    const [near, far] = this.#ends
    await tool('ip', ['link', 'add', near.device, 'netns', near.namespace, 'type', 'veth', 'peer', 'name', far.device, 'netns', far.namespace])
  }

  async #makeDelayLine(delayMs: number): Promise<void> {
    const [near, far] = this.#ends
    const [command, ...args] = [...this.protectedSite, 'setpriv', '--pdeathsig', 'KILL', '--', 'perl', `${projectDir()}/test/lab/delay-line`, `/run/netns/${far.namespace}`, near.device, far.device, String(delayMs)]
    const line = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'] })
    this.#delayLine = line
    let problem = ''
    line.stderr.on('data', (text: Buffer) => (problem += text.toString()))
    const ready = await Promise.race([once(createInterface({ input: line.stdout }), 'line').then(() => true), once(line, 'exit').then(() => false)])
    if (!ready) throw new CdpError('IO', `no line with a delay: ${problem}`)
  }

  /** Where a packet arrives: of one that is dropped where it leaves, the sender's own kernel tells. */
  async #drop(which: readonly string[]): Promise<void> {
    for (const { namespace, device } of this.#ends) await tool('ip', ['netns', 'exec', namespace, 'iptables', '-A', 'INPUT', '-i', device, ...which, '-j', 'DROP'])
  }
}
