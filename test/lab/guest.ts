import { CdpError } from '../../core/errors/index.ts'
import { GuestChannel, jobDir, type CommandResult, type GuestJob } from './channel.ts'
import { guestImage } from './guest-image.ts'
import type { LabVm } from './lab-vm.ts'
import { attachVm, startVm, type StartVmOptions } from './vm.ts'

export type BootGuestOptions = Omit<StartVmOptions, 'kernel' | 'initrd' | 'append'> & {
  /** Keys of disks with ext4 on them, mounted at /mnt/KEY. */
  mount?: readonly string[]
  /** Until commands are answered; 60 s by default: two cores may be busy. */
  deadlineMs?: number
  /** Another unpacked kernel package than .cache/debian/kernel. */
  kernelTree?: string
  /** Appended to the kernel's command line. */
  append?: string
}

/** Starts a VM with the lab's Linux in it, and waits until it takes commands and has mounted what was asked for. */
export const bootGuest = async (options: BootGuestOptions): Promise<Guest> => {
  const { mount = [], deadlineMs = 60_000, append, kernelTree, ...rest } = options
  const { kernel, initrd } = await guestImage(kernelTree)
  const disks = options.disks.map(({ key }) => key).join(',')
  const startedAt = performance.now()
  const vm = await startVm({ ...rest, kernel, initrd, append: `console=ttyS0 quiet loglevel=4 mitigations=off panic=-1 lab.disks=${disks}${append ? ` ${append}` : ''}` })
  try {
    await vm.waitForLine(/lab: channel ready/, deadlineMs, options.signal)
    const guest = new Guest(vm, await GuestChannel.open(vm.serial0Path), performance.now() - startedAt)
    await guest.check(':', { deadlineMs })
    for (const key of mount) await guest.mount(key)
    return guest
  } catch (error) {
    await vm.kill()
    throw error
  }
}

/** Takes over a guest that another process booted under this root directory (lab up). */
export const attachGuest = async (rootDir: string, vmId: number): Promise<Guest> => {
  const vm = await attachVm(rootDir, vmId)
  const guest = new Guest(vm, await GuestChannel.open(vm.serial0Path), 0)
  await guest.check(':')
  return guest
}

export class Guest {
  readonly vm: LabVm
  readonly channel: GuestChannel
  /** From the start of QEMU to the first answer. */
  readonly bootMs: number

  constructor(vm: LabVm, channel: GuestChannel, bootMs: number) {
    this.vm = vm
    this.channel = channel
    this.bootMs = bootMs
  }

  /** Runs a shell script in the guest. */
  run(script: string, options: { deadlineMs?: number } = {}): Promise<CommandResult> {
    return this.channel.run(script, options)
  }

  /** The output of a script that has to end with exit code 0, else IO. */
  async check(script: string, options: { deadlineMs?: number } = {}): Promise<string> {
    const { exitCode, stdout, stderr } = await this.run(script, options)
    if (exitCode === 0) return stdout
    throw new CdpError('IO', `in guest ${this.vm.vmId}: exit code ${exitCode} from ${script.slice(0, 200)}: ${(stderr + stdout).slice(-1000)}`)
  }

  /** Starts a script and leaves it running. */
  start(script: string): GuestJob {
    return this.channel.start(script)
  }

  /** What a job has printed so far. */
  async outputOf(job: GuestJob): Promise<string> {
    const { exitCode, stdout } = await this.run(`cat ${jobDir(job.id)}/out`)
    return exitCode === 0 ? stdout : (await job.ended).stdout // it has ended in between, and the guest has forgotten it
  }

  /** Ends a job with its children and waits for that. */
  async end(job: GuestJob, signal: 'TERM' | 'KILL' = 'TERM'): Promise<CommandResult> {
    await this.channel.signal(job.id, signal).ended
    return job.ended
  }

  /** Mounts the ext4 on a disk at /mnt/KEY. */
  async mount(key: string, options = 'noatime'): Promise<string> {
    await this.check(`mkdir -p /mnt/${key} && mount -t ext4 -o ${options} /dev/lab/${key} /mnt/${key}`)
    return `/mnt/${key}`
  }

  async umount(key: string): Promise<void> {
    await this.check(`umount /mnt/${key}`)
  }

  /** Power button: the guest unmounts and goes down, QEMU is told to quit. False if it had to be forced. */
  async stop(deadlineMs = 20_000): Promise<boolean> {
    const graceful = await this.vm.stop(deadlineMs)
    this.channel.close()
    return graceful
  }

  /** SIGKILL to QEMU. */
  async kill(): Promise<void> {
    this.channel.close()
    await this.vm.kill()
  }

  /** Lets go of a guest that shall go on. */
  detach(): void {
    this.channel.close()
    this.vm.detach()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.channel.close()
    await this.vm[Symbol.asyncDispose]()
  }
}
