import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { tool } from '../../test/lab/index.ts'

/**
 * An authority and the certificates of both ends as QEMU's tls-creds-x509 and nbdkit's --tls-certificates look for them: RSA 2048,
 * key encipherment, and the address as a subject alternative name.
 */
export const makeTlsCertificates = async (directory: string): Promise<string> => {
  mkdirSync(directory, { recursive: true, mode: 0o700 })
  const at = (name: string): string => join(directory, name)
  const openssl = (...args: string[]): Promise<unknown> => tool('openssl', args)
  await openssl('req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=bench authority', '-keyout', at('ca-key.pem'), '-out', at('ca-cert.pem'),
    '-addext', 'keyUsage=critical,keyCertSign,cRLSign')
  for (const [end, usage] of [['server', 'serverAuth'], ['client', 'clientAuth']]) {
    writeFileSync(at(`${end}.ext`), [
      'basicConstraints=critical,CA:FALSE', 'keyUsage=critical,digitalSignature,keyEncipherment', `extendedKeyUsage=${usage}`, 'subjectAltName=IP:127.0.0.1,DNS:localhost', '',
    ].join('\n'))
    await openssl('req', '-newkey', 'rsa:2048', '-nodes', '-subj', `/CN=${end}`, '-keyout', at(`${end}-key.pem`), '-out', at(`${end}.csr`))
    await openssl('x509', '-req', '-days', '2', '-in', at(`${end}.csr`), '-CA', at('ca-cert.pem'), '-CAkey', at('ca-key.pem'), '-CAcreateserial', '-extfile', at(`${end}.ext`),
      '-out', at(`${end}-cert.pem`))
  }
  return directory
}
